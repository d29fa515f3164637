"""`shoal demo`: the whole loop on one machine, with real processes and real data."""

import os

# gRPC's handlers around fork() complain on the terminal at each process the demo starts; the
# children are new programs and share nothing. It must be set before gRPC is first imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
