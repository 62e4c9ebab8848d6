"""The words that all floors share: types, errors, ports and the wire codec. No torch, no numpy, no HTTP."""
