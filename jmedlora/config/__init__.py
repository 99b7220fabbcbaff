"""What a sweep may say: pydantic models, composition of YAML files, and checks across fields."""
