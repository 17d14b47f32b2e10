"""Conversions of networks to the formats of other runtimes, for exports and for backends of the server. Independent of files and HTTP."""
