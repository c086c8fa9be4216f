from typing import TypedDict

class _Row(TypedDict):
    name: str
    device: str
    arch_min: int
    arch_max: int
    dtypes: list[str]
    head_dim_max: int

class _Estimate(TypedDict):
    flops: float
    input_bytes: float
    output_bytes: float
    score_matrix_bytes: float
    naive_traffic_bytes: float
    tiled_traffic_bytes: float
    naive_peak_bytes: float
    tiled_peak_bytes: float

def supported() -> list[_Row]: ...
def explain(
    device_kind: str,
    arch: int,
    dtype_name: str,
    B: int,
    H: int,
    H_kv: int,
    S_q: int,
    S_kv: int,
    D: int,
    D_v: int,
    /,
) -> str: ...
def estimate(
    B: int,
    H: int,
    H_kv: int,
    S_q: int,
    S_kv: int,
    D: int,
    D_v: int,
    dtype_name: str,
    alignment: int,
    window_left: int,
    window_right: int,
    tile_q: int,
    /,
) -> _Estimate: ...
def built_with_cuda() -> bool: ...
def cpu_instruction_set() -> str: ...
