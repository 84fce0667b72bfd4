"""Training methods, one folder each: what else happens in a training step."""

from bitwright.methods.adaqat import AdaQAT
from bitwright.methods.allocation import Allocation
from bitwright.methods.amed import AMED
from bitwright.methods.base import Batch, Method
from bitwright.methods.bwrf import BWRF
from bitwright.methods.cage import CAGE
from bitwright.methods.channel_bits import ChannelBits
from bitwright.methods.constrained import Constrained
from bitwright.methods.csq import CSQ
from bitwright.methods.ewgs import EWGSDelta
from bitwright.methods.gaqat import GAQAT
from bitwright.methods.hgq import HGQ
from bitwright.methods.kd import KD
from bitwright.methods.pege import PEGECurriculum
from bitwright.methods.quantnet import QuantNet
from bitwright.methods.relational import Relational
from bitwright.methods.saq import SAQ

__all__ = [
    "AMED",
    "BWRF",
    "CAGE",
    "CSQ",
    "GAQAT",
    "HGQ",
    "KD",
    "SAQ",
    "AdaQAT",
    "Allocation",
    "Batch",
    "ChannelBits",
    "Constrained",
    "EWGSDelta",
    "Method",
    "PEGECurriculum",
    "QuantNet",
    "Relational",
]
