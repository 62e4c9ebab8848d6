"""An application in the style of the old packages."""
