"""HTTP: dialects in, frames out."""
