"""The node agent: captures the packets of this node's pods as PacketCapture objects ask, and serves the files."""
