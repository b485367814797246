"""The programs: batching on the host, the forward pass, the token loop, scoring."""
