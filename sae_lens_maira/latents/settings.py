"""What a record set keeps of each latent, and how its collection behaves. It knows nothing about rows."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What to keep.

    Attributes:
        model, sae, control: names for the record set's meta; control is "trained", "untrained", "untrained_whitened"
            or "raw".
        latents: write records of these only; all if None. Statistics and neighbours always see all.
        top: contexts of largest activation.
        intervals: octaves of activation, highest first, that get contexts.
        per_interval: contexts of each.
        zero: contexts of studies in which the latent never fires.
        min_studies: fewer active studies make a latent "rare".
        tokens: output tokens at either end.
        findings: findings of highest F1 per kind of position.
        neighbours: of each relation.
        sample_rows: rows per kind on which co-firing is measured.
        keep_images: copy images also of credentialed studies; None copies those of the others only.
        image_side: largest side of a copied image in pixels.
        chunk: rows encoded at once.
        salt: of pseudonyms; drawn anew and not kept if None.
        seed: of every draw.
        save_seconds: of work that a kill may lose.
        progress: show bars.
    """

    model: str = "phantom"
    sae: str = ""
    control: str = "trained"
    latents: tuple[int, ...] | None = None
    top: int = 20
    intervals: int = 5
    per_interval: int = 5
    zero: int = 20
    min_studies: int = 10
    tokens: int = 10
    findings: int = 5
    neighbours: int = 5
    sample_rows: int = 4096
    keep_images: bool | None = None
    image_side: int = 256
    chunk: int = 2048
    salt: str | None = None
    seed: int = 0
    save_seconds: float = 60.0
    progress: bool = False
