"""What a person looks at: consumers of events, and of what a run has left in its folder."""
