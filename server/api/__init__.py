"""The gRPC faces of the fleet server, and the JSON documents that its answers carry."""
