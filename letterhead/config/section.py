"""What the sections of an experiment's YAML are made of: strict keys, and files that are read as
plain data."""

from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field
from yaml import YAMLError

Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file holds.

    Raises
    ------
    ValueError : no such file, not YAML, or not a mapping
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a mapping of keys")
    return config
