"""A small web service that runs jobs: see README.md beside this file."""
