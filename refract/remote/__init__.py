"""Files at URLs: s3://, gs://, az://, https:// and hf://. Their libraries are imported when a URL is used."""
