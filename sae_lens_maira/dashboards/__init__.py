"""Dashboards from latent records: Neuronpedia files, a page with images, validation, and a guarded upload."""
