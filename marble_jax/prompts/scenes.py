"""General prompts: somebody or something in a place, in a style; no quotes, so that no reward for text applies."""

from __future__ import annotations

import random

from marble_jax.prompts.files import Prompt

_SUBJECTS = """an old fisherman|a young violinist|a red fox|a sleeping cat|a golden retriever puppy|a white owl|
a knight in worn armor|a robot gardener|a ballet dancer|a street musician|a glass chess set|a steam locomotive|
a hummingbird|a giant sea turtle|an astronaut|a mountain goat|a baker with flour on her hands|a wooden sailing ship|
a stack of pancakes|a bowl of ramen|a vintage motorcycle|a lighthouse|a treehouse|a field of tulips|a stone bridge|
a samurai|a wizard with a long beard|a family of ducks|a spiral staircase|a hot air balloon|a fruit still life|
a tiny dragon|a carousel horse|a deep-sea diver|a grandmother knitting|a jazz trio|a snow leopard|a paper lantern|
a greenhouse full of ferns|a futuristic tram|a medieval castle|a jellyfish|a cup of hot chocolate|a windmill|
a portrait of a woman with freckles|a portrait of a man in a blue turban|two children flying a kite|a market seller|
a crystal cave|a bonsai tree|a tram conductor|a barn owl chick|a clockwork beetle|a flamingo|a pair of hiking boots|
a lone cyclist|a ceramic teapot|a herd of wild horses|a lavender farm|a blacksmith at work""".replace(
    "\n", ""
).split("|")
_PLACES = """in a quiet forest|on a rainy city street|by a mountain lake|in a sunlit kitchen|on a windy beach|
in a crowded night market|at the edge of a cliff|in an abandoned factory|under a starry sky|in a snowy village|
in a desert at noon|inside a grand library|on a rooftop garden|beside a waterfall|in a field of wheat|
under cherry trees in bloom|in a dark alley|on a frozen river|in a small workshop|above the clouds|
on the surface of the moon|in a coral reef|at a country fair|in an empty theater|on a train platform|
in a misty valley|beside a campfire|in front of a pale green wall|in a Moroccan courtyard|
on a cobblestone square""".replace("\n", "").split("|")
_STYLES = """oil painting|watercolor|35mm film photograph|charcoal sketch|studio photograph with soft light|
isometric 3D render|ukiyo-e woodblock print|children's book illustration|cinematic still, shallow depth of field|
pixel art|art nouveau poster|macro photograph|low-poly render|impressionist painting|black and white photograph|
concept art, dramatic light|paper cut-out collage|pastel drawing|long-exposure photograph|stained glass|
flat vector illustration|claymation still|baroque portrait lighting|golden hour photograph|
ink drawing with fine lines""".replace("\n", "").split("|")
_DETAILS = """highly detailed|muted colors|vivid colors|seen from above|seen from below|close-up|wide shot|
centered composition|strong contrast|gentle haze|reflections in puddles|falling leaves|light snow|
long shadows|warm lantern light""".replace("\n", "").split("|")


def split(
    source: str, num_train: int, num_test: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and test prompts, all different.

    Args:
      source: name of the set.
      num_train: training prompts.
      num_test: test prompts.
      seed: of the draw.
    """
    rng = random.Random(seed)
    # A dict as a set that keeps the order.
    drawn: dict[str, None] = {}
    while len(drawn) < num_train + num_test:
        scene = f"{rng.choice(_SUBJECTS)} {rng.choice(_PLACES)}"
        parts = [scene, rng.choice(_STYLES), rng.choice(_DETAILS)]
        # The scene alone, with a style, or with a style and a detail: short and long prompts side
        # by side.
        num_parts = rng.choice((1, 2, 2, 3, 3, 3))
        text = ", ".join(parts[:num_parts])
        drawn[text] = None
    prompts = [Prompt(text, source) for text in drawn]
    rng.shuffle(prompts)
    return prompts[num_test:], prompts[:num_test]
