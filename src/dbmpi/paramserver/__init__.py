"""The sharded parameter server: layout, window, rules, server, client."""
