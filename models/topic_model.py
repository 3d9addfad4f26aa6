"""Topics (latent Dirichlet allocation): which words go together in 20 short documents?

Data: word counts simulated with NumPy's ``default_rng(5)``: three topics over 15 words, each topic fond
of five of them; 20 documents of 60 words, each mostly about one topic.

What is hard: everything is a simplex, and topics have no names: any of their 3! orders fits as well, so
that the posterior has six modes. The words' assignments are summed out, as in Blei, Ng & Jordan (2003)
their bound does by hand.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

TOPICS, WORDS = 3, 15


def topic_model(documents, length, y=None):
    with pyro.plate("topic", TOPICS, dim=-1):
        words = pyro.sample("words", dist.Dirichlet(torch.full((WORDS,), 0.5)))
    with pyro.plate("document", documents, dim=-1):
        topics = pyro.sample("topics", dist.Dirichlet(torch.full((TOPICS,), 0.5)))
        # Both are [*particles, rows, event]; a document's words are a mixture of its topics' words.
        share = topics @ words
        counts = dist.Multinomial(length, probs=share, validate_args=False)
        return pyro.sample("y", counts, obs=y)


def simulate(documents=20, length=60, seed=5):
    rng = np.random.default_rng(seed)
    fond = np.kron(np.eye(TOPICS), np.ones(WORDS // TOPICS))
    words = np.stack([rng.dirichlet(0.1 + 2.0 * row) for row in fond])
    topics = rng.dirichlet(np.full(TOPICS, 0.3), size=documents)
    counts = np.stack([rng.multinomial(length, share) for share in topics @ words])
    return torch.tensor(counts, dtype=torch.get_default_dtype())


Y = simulate()

MODEL = vi.Model(
    topic_model, len(Y), 60, Y, dims={"words": ["word"], "topics": ["about"], "y": ["word"]}
)
