// activate: pieces of up to kActivatePiece columns of a row are widened to f32 in the L1 cache, put through
// the activation and narrowed. Pieces are numbered row by row; a call computes those in [begin, end).

// Asks for the input of the piece after this one while this one is computed on.
template <class T>
MOECORE_INLINE void prefetch_piece(const ActivateProblem& p, std::int64_t piece, std::int64_t end,
                                   std::int64_t pieces_per_row) {
  if (piece >= end) return;
  const std::int64_t row = piece / pieces_per_row, column = piece % pieces_per_row * kActivatePiece;
  const std::int64_t n = p.inter - column < kActivatePiece ? p.inter - column : kActivatePiece;
  const GateOrder order = p.activation.order;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  auto prefetch = [](const T* at, std::int64_t count) {
    const char* bytes = reinterpret_cast<const char*>(at);
    for (std::int64_t i = 0; i < count * static_cast<std::int64_t>(sizeof(T)); i += 64)
      __builtin_prefetch(bytes + i);
  };
  if (order == GateOrder::kInterleaved) return prefetch(x + 2 * column, 2 * n);
  prefetch(x + column, n);
  if (order != GateOrder::kPlain) prefetch(x + p.inter + column, n);
}

template <class T>
void activate_pieces(const ActivateProblem& p, std::int64_t begin, std::int64_t end) {
  alignas(64) float gate[kActivatePiece], up[kActivatePiece];
  const std::int64_t pieces_per_row = (p.inter + kActivatePiece - 1) / kActivatePiece;
  const GateOrder order = p.activation.order;
  for (std::int64_t piece = begin; piece < end; ++piece) {
    const std::int64_t row = piece / pieces_per_row, column = piece % pieces_per_row * kActivatePiece;
    const std::int64_t n = p.inter - column < kActivatePiece ? p.inter - column : kActivatePiece;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    if (order == GateOrder::kInterleaved) {
      widen_pairs(x + 2 * column, gate, up, n);
    } else {
      widen(x + column + (order == GateOrder::kUpGate ? p.inter : 0), gate, n);
      if (order != GateOrder::kPlain) widen(x + column + (order == GateOrder::kUpGate ? 0 : p.inter), up, n);
    }
    prefetch_piece<T>(p, piece + 1, end, pieces_per_row);
    activate_floats(p.activation, gate, order == GateOrder::kPlain ? nullptr : up, gate, n);
    narrow(gate, static_cast<T*>(p.out) + row * p.out_stride + column, n);
  }
}

inline void activate(const ActivateProblem& p, std::int64_t begin, std::int64_t end) {
  visit_instance(ActivateTypes{}, p.dtype,
                 [&]<DType dtype>() { activate_pieces<Element<dtype>>(p, begin, end); });
}
