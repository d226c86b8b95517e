"""The model: decoder back-ends, vision tower, projector, retriever and loader."""
