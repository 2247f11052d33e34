"""A StreamForge that can be run: it plays customers, billing and product use, and keeps the truth to check against."""
