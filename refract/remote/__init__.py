"""Files at URLs: s3://, https:// and hf://. Independent of what the files contain. Nothing is imported before a URL is used."""
