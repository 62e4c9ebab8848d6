"""What a device can do: the narrow waist (`base`, `spec`, `tensors`) and its executors (`cpu`, `reference`, `mock`, `cuda`)."""
