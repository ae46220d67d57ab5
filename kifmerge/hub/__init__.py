"""Files of repositories on the Hub: named, read by range or brought here, and committed."""
