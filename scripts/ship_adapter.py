"""Put a trained adapter into the package, in 8 bits and packed: less than half the room of bfloat16.

python scripts/ship_adapter.py RUN NAME [--step N]

RUN is a run of the phases binding or execution, NAME how the model is to be called. The two matrices of every product are
multiplied by powers of two so that their weights use the range of 8-bit floats, and the adapter's alpha is divided by both;
this changes no product. Rounding does: of each weight three bits of its fraction are kept.
"""

import argparse
import lzma
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import codetrace
from codetrace.core.files import atomic_write, read_json, write_json
from codetrace.runs.manifest import resolve_run

FLOAT8 = torch.float8_e4m3fn
DATA = Path(codetrace.__file__).resolve().parent / "data"


def power_of_two(weights: list[torch.Tensor]) -> float:
    "The largest factor with which no weight leaves the range of 8-bit floats."
    largest = max(float(weight.abs().max()) for weight in weights)
    return 2.0 ** math.floor(math.log2(torch.finfo(FLOAT8).max / largest))


def in_eight_bits(source: Path, target: Path) -> None:
    "Write an adapter's folder with 8-bit weights."
    state = {name: weight.float() for name, weight in load_file(source / "adapter_model.safetensors").items()}
    factors = {}
    for side in ("lora_A", "lora_B"):
        factors[side] = power_of_two([weight for name, weight in state.items() if side in name])
        state |= {name: (weight * factors[side]).to(FLOAT8) for name, weight in state.items() if side in name}
    config = read_json(source / "adapter_config.json")
    config["lora_alpha"] /= math.prod(factors.values())
    target.mkdir(parents=True, exist_ok=True)
    save_file(state, target / "adapter_model.safetensors")
    write_json(target / "adapter_config.json", config)


def pack_weights(folder: Path) -> None:
    "Replace an adapter's weights by the packed file that `codetrace.models.folders` unpacks."
    weights = folder / "adapter_model.safetensors"
    packed = lzma.compress(weights.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    atomic_write(folder / "adapter_model.safetensors.xz", packed)
    weights.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run id or folder of a complete run")
    parser.add_argument("name", help="of the model, and of its folder in the package")
    parser.add_argument("--step", type=int, help="after which step of training; default: the last")
    options = parser.parse_args()
    steps = {
        int(path.name.removeprefix("step-")): path
        for path in Path(resolve_run(options.run)["folder"]).glob("weights/step-*")
    }
    in_eight_bits(steps[options.step or max(steps)], DATA / options.name)
    pack_weights(DATA / options.name)
    print(DATA / options.name)


if __name__ == "__main__":
    main()
