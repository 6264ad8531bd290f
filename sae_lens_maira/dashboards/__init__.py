"""Writers over latent records: Neuronpedia files, a multimodal page, validation and a guarded upload."""
