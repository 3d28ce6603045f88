"""Ray Serve deployments."""

import os

# By default Serve replaces a proxy after three readiness checks of five seconds, and then fails with a traceback. That
# is too short for a machine under load. A Ray started after this import, such as by ``serve run``, inherits the longer
# timeout.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "20")
