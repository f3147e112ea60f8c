"""The part of the node agent that has capabilities: captures packets to files, and talks to nobody but the agent."""
