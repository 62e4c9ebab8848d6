"""Pure translation between a wire format and the neutral request and events. No I/O, no clock but what is passed in."""
