"""EndpointPickerConfig: its schema, strict loading with every fault reported at once, and the defaults for what was left out."""
