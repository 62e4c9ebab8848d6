"""Weight files: GGUF and safetensors, mapped and never unpickled."""

from sagellm_core.loader.model import ModelFiles, open_model

__all__ = ["ModelFiles", "open_model"]
