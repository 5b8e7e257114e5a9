# Sourced by scripts/demo and scripts/test: `set_up [EXTRA]` leaves a .venv with the package and its pinned dependencies.
# Needs Python 3.11 with pip and venv. Installs again only after pyproject.toml or constraints.txt changed, or the checkout moved.

set_up() {
  local extra=${1:-} python=${PYTHON:-python3} wanted stamp=.venv/set-up
  wanted="$(pwd) $(cat pyproject.toml constraints.txt | cksum)"
  # A set-up with an extra serves those who need none.
  if [[ -x .venv/bin/python ]] && grep -qsxF -e "$wanted [$extra]" -e "${wanted} [${extra:-dev}]" $stamp; then
    return
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "gen_invariance needs Python 3.11 or newer as '$python'; set PYTHON=/path/to/python" >&2
    exit 2
  fi
  echo "setting up .venv (once, a few minutes at most) ..." >&2
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear .venv
  fi
  .venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
  # Compiled by all cores instead of one by pip; files that are not Python, such as templates, stay as they are, and so
  # do large parts of libraries of which little or nothing is imported (Python compiles a file when it first does).
  local seldom='transformers/models|diffusers/(modular_)?pipelines|torch/(_inductor|testing)|sympy/physics|pip|setuptools'
  seldom+='|ray/(rllib|serve|tune|train|data|dashboard|autoscaler)|onnxscript|mypy'
  .venv/bin/python -m compileall -qq -j 0 -x "/(tests?|$seldom)/" .venv/lib || true
  echo "$wanted [$extra]" >$stamp
}
