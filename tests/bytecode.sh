# To be sourced. Python keeps what it has compiled, in target/pycache and not beside the sources: an engine is thousands of modules,
# and each of its processes would spend 20 s of a processor on importing them, where 9 do.
unset PYTHONDONTWRITEBYTECODE
PYTHONPYCACHEPREFIX=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/target/pycache
export PYTHONPYCACHEPREFIX
