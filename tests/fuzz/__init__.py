"""Bad inputs for every script: each must end with one sentence and exit code 2, and leave nothing half-written."""
