"""Associative memories: pure functions on tensors (design: four axes and a clock).

`scan` runs a memory over tokens; `catalog` names the memories of the literature.
"""

from .algorithms import Descent as Descent
from .algorithms import Momentum as Momentum
from .algorithms import OrthogonalizedMomentum as OrthogonalizedMomentum
from .architectures import MLP as MLP
from .architectures import Matrix as Matrix
from .associative import AssociativeMemory as AssociativeMemory
from .catalog import catalog as catalog
from .engine import Explanation as Explanation
from .engine import absorb as absorb
from .engine import explain as explain
from .engine import scan as scan
from .engine import surprise as surprise
from .kernels.newton_schulz import newton_schulz as newton_schulz
from .objectives import L2 as L2
from .objectives import DotProduct as DotProduct
from .objectives import Huber as Huber
from .objectives import Lp as Lp
from .objectives import Objective as Objective
from .objectives import ThresholdObjective as ThresholdObjective
from .objectives import ValueShiftRobust as ValueShiftRobust
from .retention import KL as KL
from .retention import Bregman as Bregman
from .retention import Decay as Decay
from .retention import Delta as Delta
from .retention import ElasticNet as ElasticNet
from .retention import Lq as Lq
from .retention import LqDual as LqDual
from .retention import Retention as Retention
from .types import Factor as Factor
from .types import Gates as Gates
from .types import State as State
