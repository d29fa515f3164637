"""The contracts: protobuf services, MQTT topics, record schemas, signing bytes, bundles."""
