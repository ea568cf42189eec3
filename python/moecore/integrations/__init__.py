"""moecore inside other frameworks. Modules are imported on request."""
