// AdamW's update of the parameters and moments of one leaf, in one pass over memory.
//
// XLA on a CPU makes one loop for every output: three passes, which move 40 bytes per
// float32 parameter. This pass reads p, m, v and g and writes p, m and v: 28 bytes.
//
// build.py compiles this file at first use, against the headers that jaxlib contains.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// In the order of SCALARS in kernel.py.
struct Scalars {
  float decay1, rest1, correction1;
  float decay2, rest2, correction2;
  float eps, eps_root, learning_rate, weight_decay, gradient_factor;
};

struct BFloat16 {
  uint16_t bits;
};

inline float Load(float x) { return x; }
inline float Load(BFloat16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void Store(float x, float* to) { *to = x; }
inline void Store(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t quiet_nan = (bits >> 16) | 0x40;  // rounding could make a NaN infinite
  to->bits = static_cast<uint16_t>(x != x ? quiet_nan : nearest_even);
}

// The operations of clip_by_global_norm, scale_by_adam, add_decayed_weights,
// scale_by_learning_rate and apply_updates, one by one in float32. The compiler
// vectorizes them.
template <typename P, typename G>
void Update(const Scalars& s, int64_t n, P* __restrict p, float* __restrict m,
            float* __restrict v, const G* __restrict g) {
  const Scalars c = s;
  const float over1 = 1 / c.correction1, over2 = 1 / c.correction2;  // like XLA
  const bool decays = c.weight_decay != 0;  // 0 * p is NaN for an infinite p
  for (int64_t i = 0; i < n; ++i) {
    const float gradient = c.gradient_factor * Load(g[i]), parameter = Load(p[i]);
    m[i] = c.decay1 * m[i] + c.rest1 * gradient;
    v[i] = c.decay2 * v[i] + c.rest2 * gradient * gradient;
    const float root = std::sqrt(v[i] * over2 + c.eps_root);
    float update = m[i] * over1 / (root + c.eps);
    update = decays ? update + c.weight_decay * parameter : update;
    Store(parameter + -c.learning_rate * update, p + i);
  }
}

// The state that the threads of one call share. A thread of the pool may start after
// the work is done, even after the buffers are gone. It then finds no chunk left and
// touches nothing but this object.
struct Work {
  template <typename F>
  void TakeChunks(const F& update) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      update(i);
      done.CountDown();
    }
  }

  explicit Work(int64_t chunks) : chunks(chunks), done(chunks) {}

  const int64_t chunks;
  std::atomic<int64_t> next{0};
  ffi::CountDownPromise done;
};

constexpr int64_t kChunk = 1 << 14;  // elements; takes some microseconds
// Up to this many elements one thread updates the leaf, because waking others is not
// worth it: XLA runs several calls at a time.
constexpr int64_t kInline = 1 << 17;

template <typename P, typename G>
ffi::Future Run(ffi::ThreadPool& pool, const Scalars& s, int64_t n, void* p, float* m,
                float* v, const void* g) {
  auto update = [s, n, m, v, p = static_cast<P*>(p), g = static_cast<const G*>(g)](
                    int64_t begin, int64_t end) {
    Update(s, end - begin, p + begin, m + begin, v + begin, g + begin);
  };
  if (n <= kInline) {
    update(0, n);
    ffi::Promise done;
    ffi::Future future(done);
    done.SetAvailable();
    return future;
  }
  auto work = std::make_shared<Work>((n + kChunk - 1) / kChunk);
  ffi::Future future(work->done);
  auto take = [work, update, n] {
    work->TakeChunks([&](int64_t i) {
      update(i * kChunk, std::min(n, (i + 1) * kChunk));
    });
  };
  const int64_t helpers = std::min(pool.num_threads(), work->chunks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(take)(take));
  // This thread may belong to the pool, so it must not wait for the others. It takes
  // chunks as they do, and the future tells XLA when the last chunk is done.
  take();
  return future;
}

ffi::Future Failed(const char* why) {
  ffi::Promise failed;
  ffi::Future future(failed);
  failed.SetError(ffi::Error::InvalidArgument(why));
  return future;
}

ffi::Future OnePass(ffi::ThreadPool pool, ffi::AnyBuffer p, ffi::Buffer<ffi::F32> m,
                    ffi::Buffer<ffi::F32> v, ffi::AnyBuffer g,
                    ffi::Buffer<ffi::F32> scalars, ffi::Result<ffi::AnyBuffer> new_p,
                    ffi::Result<ffi::Buffer<ffi::F32>> new_m,
                    ffi::Result<ffi::Buffer<ffi::F32>> new_v) {
  const size_t n = p.element_count();
  for (size_t size : {m.element_count(), v.element_count(), g.element_count(),
                      new_p->element_count(), new_m->element_count(),
                      new_v->element_count()}) {
    if (size != n) return Failed("p, m, v and g must have the same size");
  }
  Scalars s;
  if (scalars.size_bytes() != sizeof s) return Failed("scalars must have 11 elements");
  std::memcpy(&s, scalars.untyped_data(), sizeof s);
  // The results alias the operands. Without aliasing, copying keeps this correct.
  auto in_place = [](const auto& from, auto& to) {
    void* data = to->untyped_data();
    if (data != from.untyped_data() && from.size_bytes()) {
      std::memcpy(data, from.untyped_data(), from.size_bytes());
    }
    return data;
  };
  void* to_p = in_place(p, new_p);
  auto* to_m = static_cast<float*>(in_place(m, new_m));
  auto* to_v = static_cast<float*>(in_place(v, new_v));
  auto run = [&](auto p_type, auto g_type) {
    return Run<decltype(p_type), decltype(g_type)>(pool, s, static_cast<int64_t>(n),
                                                   to_p, to_m, to_v, g.untyped_data());
  };
  const auto p_type = p.element_type(), g_type = g.element_type();
  if (new_p->element_type() != p_type) return Failed("new p must have the type of p");
  if (p_type == ffi::F32 && g_type == ffi::F32) return run(float{}, float{});
  if (p_type == ffi::F32 && g_type == ffi::BF16) return run(float{}, BFloat16{});
  if (p_type == ffi::BF16 && g_type == ffi::F32) return run(BFloat16{}, float{});
  if (p_type == ffi::BF16 && g_type == ffi::BF16) return run(BFloat16{}, BFloat16{});
  return Failed("p and g must be float32 or bfloat16");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(adamw_jax_one_pass, OnePass,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
