"""Load generator and measurements: workloads, runner, report, plot, comparison. Works against any OpenAI-compatible URL."""
