#   Copyright 2026 - present The PyMC Developers
#
#   Licensed under the Apache License, Version 2.0 (the "License");
#   you may not use this file except in compliance with the License.
#   You may obtain a copy of the License at
#
#       http://www.apache.org/licenses/LICENSE-2.0
#
#   Unless required by applicable law or agreed to in writing, software
#   distributed under the License is distributed on an "AS IS" BASIS,
#   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
#   See the License for the specific language governing permissions and
#   limitations under the License.
"""The parts of :mod:`pymc.variational.streaming`, in the order in which the data meet them.

Rows come from ``sources``, are mixed and cut in ``batches`` and watched by ``order``; ``reader``
keeps the place, and ``dataset`` puts each batch into a variable of a model that ``guards`` has
checked. ``fit`` looks at the result, and ``preshuffle`` orders rows at random on disk before all.
"""
