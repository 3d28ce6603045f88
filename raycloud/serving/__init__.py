"""Ray Serve deployments."""

import os

# Serve replaces a proxy that three checks of five seconds found not ready, and ends with a traceback: too soon for a
# machine under load. A Ray that is started after this import, as by ``serve run``, inherits the longer patience.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "20")
