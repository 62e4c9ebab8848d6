"""Model families as data: file metadata -> `DecoderSpec`, tensor names -> weight slots. One small file a family."""
