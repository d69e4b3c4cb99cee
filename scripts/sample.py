"""Let a trained model continue a text: `python -m scripts.sample --model-tag d12 --prompt "def "`.

Prompt and continuation share one context: a longer prompt is refused, and a continuation that would not fit ends where the
context is full, with a line on stderr that says so.
"""

import sys
from pathlib import Path

from nanochat import parallel
from nanochat.build import PRECISIONS, check_tokenizer, load_model
from nanochat.dataset import base_dir
from nanochat.errors import BadInput, Parser, run
from nanochat.generate import generate, room
from nanochat.tokenizer import Tokenizer


def main() -> None:
    """Parse the command line, load, print the text as it is sampled."""
    parser = Parser("sample", description="continue a text")
    parser.add_argument("--model-tag", required=True, help="the run: d12, or a directory of checkpoints")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint; default the newest good one")
    parser.add_argument("--prompt", default="", help="the beginning of the text")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens to sample, at most; fewer if the context is full")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest; 0 = among all")
    parser.add_argument("--seed", type=int, default=42, help="of the sampler")
    parser.add_argument("--device-type", default="", help="cuda or cpu; empty = cuda if there is one")
    parser.add_argument("--tokenizer", type=Path, default=None, help="directory of tokenizer.json; default <base>/tokenizer")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    flags = parser.parse_args()
    if flags.max_tokens < 1 or flags.temperature < 0 or flags.top_k < 0:
        raise BadInput("--max-tokens must be at least 1, --temperature and --top-k at least 0")
    device = parallel.init(flags.device_type).device
    tokenizer = Tokenizer.load(flags.tokenizer or base_dir() / "tokenizer")
    model, saved = load_model(flags.model_tag, flags.step, device, flags.precision)
    check_tokenizer(tokenizer, saved)
    ids = [tokenizer.bos_id, *tokenizer.encode(flags.prompt, bos=False)]
    context, space = model.config.sequence_len, room(model, ids)
    if space < 1:
        raise BadInput(
            f"--prompt has {len(ids)} tokens, the one that starts a text included, and this model's context is {context}: "
            f"shorten it to {context - 1} at most"
        )
    if space < flags.max_tokens:
        said = f"the context of {context} holds {space} after the prompt's {len(ids)}"
        print(f"at most {space} tokens are sampled, not {flags.max_tokens}: {said}", file=sys.stderr)
    sampled = generate(
        model, ids, flags.max_tokens, temperature=flags.temperature, top_k=flags.top_k, seed=flags.seed, stop=tokenizer.bos_id
    )
    print(flags.prompt + tokenizer.decode(list(sampled)))


if __name__ == "__main__":
    run(main)
