"""Errors that this package raises.

    MairaError
    ├── ConfigError         a configuration value or key is wrong
    ├── CheckpointError     a model folder is incomplete, damaged or of another kind
    ├── ImageError          an image cannot be read or has no contrast
    ├── PromptError         a prompt cannot be built from the given study or text
    ├── StudyError          a study record or a table of studies is inconsistent
    ├── HookError           a hook point is unknown, does not match the model, or was never called
    ├── SAEError            an SAE's weights, configuration or hook point do not match
    ├── StoreError          an activation store is damaged or does not match its request
    │   └── DiskError       the disk became full during a write
    ├── BackendError        a kernel backend cannot run the requested step
    ├── LockError           another process works in the folder
    ├── RankError           a rank of a command that runs over several processes failed or died
    ├── RecordError         latent records or interpretations are incomplete or inconsistent
    ├── ServerError         a language-model or upload server refused or could not be understood
    ├── PrivacyError        credentialed data would have left the machine
    └── InterventionError   a steering intervention is impossible or has no effect

`training.interruption.StoppedError`, a signal ended a training run, is one of them and SAELens' own.

Each message states what was found, what was expected and what to do. The classes also derive from the nearest built-in
error (ValueError, OSError), so that generic code can catch them.
"""


class MairaError(Exception):
    """Base class of the errors of sae-lens-maira."""


class ConfigError(MairaError, ValueError):
    """A configuration value or key is wrong."""


class CheckpointError(MairaError, OSError):
    """A model folder is incomplete, damaged or of another kind."""


class ImageError(MairaError, ValueError):
    """An image cannot be read or has no contrast."""


class PromptError(MairaError, ValueError):
    """A prompt cannot be built from the given study or text."""


class StudyError(MairaError, ValueError):
    """A study record or a table of studies is inconsistent."""


class HookError(MairaError, ValueError):
    """A hook point is unknown, does not match the model, or was never called."""


class SAEError(MairaError, ValueError):
    """An SAE's weights, configuration or hook point do not match."""


class StoreError(MairaError, ValueError):
    """An activation store is damaged or does not match the request."""


class DiskError(StoreError, OSError):
    """A disk is full; files that were complete before are unchanged."""


class BackendError(MairaError, RuntimeError):
    """A kernel backend cannot run the requested step."""


class LockError(MairaError, RuntimeError):
    """Another process works in the folder."""


class RankError(MairaError, RuntimeError):
    """A rank of a command that runs over several processes failed or died."""


class RecordError(MairaError, ValueError):
    """Latent records or interpretations are incomplete or inconsistent."""


class ServerError(MairaError, RuntimeError):
    """A language-model or upload server refused, or its answer could not be understood."""


class PrivacyError(MairaError, PermissionError):
    """Credentialed data would have left the machine."""


class InterventionError(MairaError, ValueError):
    """A steering intervention is impossible or has no effect."""


class WorkbenchError(MairaError, ValueError):
    """A request of the workbench's page that cannot be carried out."""
