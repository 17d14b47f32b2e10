"""Webhooks: events wait in a folder and are sent as JSON over HTTP, in the background of a run or by the scheduler."""
