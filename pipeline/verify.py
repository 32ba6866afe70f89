"""Draw-once verification: walk each tree along the target's own choices.

At every node the target's next token is computed once (argmax, or a Gumbel-max sample). The walk descends while a child
carries that token; the first choice no child carries is the bonus token. The emitted tokens do not depend on the tree
at all, which is why the output is the target's own for any drafter.
"""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def walk(tokens: np.ndarray, parents: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Accepted nodes of one tree, from the root down.

    Args:
        tokens: [N] int32 token ids of the tree's nodes.
        parents: [N] int32, -1 for children of the root; parents before children, siblings distinct.
        choices: [N + 1] int64 the target's choice after the root (first) and after each node.

    Returns:
        [A] int32 node indices. The emitted tokens are `choices[0]`, then `choices[a + 1]` for each accepted node a.
    """
    accepted = np.empty(len(tokens), np.int32)
    num_accepted = 0
    node = -1
    for i in range(len(tokens)):
        if parents[i] == node and tokens[i] == choices[node + 1]:
            accepted[num_accepted] = i
            num_accepted += 1
            node = i
    return accepted[:num_accepted]
