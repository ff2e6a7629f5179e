"""Restarts, and jobs that span nodes.

engine ──► coordinator ──► agent ──► start_processes
(etcd)     (rounds)        (this node's groups, one after another)
"""
