"""The parameter server in loops of a user's own: named arrays, and shards that serve inside one call."""
