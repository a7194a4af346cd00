#include "panels.h"

#include "../core/panels.h"
#include "../core/variant.h"

// Weights are used where the caller keeps them: nothing is packed.
namespace spfmt {
namespace {

template <class T>
void multiply(const Bodies<T>& bodies, const Plan& plan, const Product& p,
              const Executor& executor) {
  constexpr int64_t kBands = 16;
  const Groups& a = plan.groups();
  const int64_t chunks = divide_up(a.bands, kBands);
  const T *values = static_cast<const T*>(p.values.data),
          *bias = static_cast<const T*>(p.bias.data);
  const Matrix<const T> in = p.in.as<const T>();
  const Matrix<T> out = p.out.as<T>();
  for_panels(
      in.cols, kLanes, executor, [&](int64_t begin, int64_t end, int width, const Executor& inner) {
        // The kernel writes whole vectors of samples.
        const bool direct = out.col_stride == 1 && (end - begin) % kLanes == 0;
        const PanelSet<T> x(a.cols, begin, end, width), y(direct ? 0 : a.rows, begin, end, width);
        x.pack(bodies.samples, in, inner);
        for_each(inner, x.size() * chunks, [&](int64_t k) {
          const int64_t i = k / chunks, first = k % chunks * kBands;
          const int64_t last = std::min(a.bands, first + kBands), row = a.row_ptr[first];
          T* to = direct ? out.data + x.sample(i) : y[i].data;
          const int64_t ldy = direct ? out.row_stride : y[i].width;
          bodies.group_panels.multiply(a, values, x.read(i), bias, to, ldy, first, last);
          bodies.samples.activate(p.activation, to, ldy, x.read(i).width, a.row_perm + row,
                                  a.row_ptr[last] - row);
        });
        if (!direct) y.unpack(bodies.samples, out, inner);
      });
}

// A panel accumulates all bands in order, so panels are the only parallel work.
template <class T>
void multiply_t(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                const Executor& executor) {
  const Groups& a = plan.groups();
  const SampleBodies<T>& samples = bodies.samples;
  const Matrix<const T> in = p.in.as<const T>();
  for_strips(in.cols, kStrip, [&](int64_t begin, int64_t end) {
    const int width = panel_width(end - begin, executor.threads, kLanes);
    const PanelSet<T> dy(a.rows, begin, end, width), dx(a.cols, begin, end, width);
    for_each(executor, dx.size(), [&](int64_t i) {
      samples.pack(samples_from(in, dy.sample(i)), dy[i], 0, a.rows);
      std::fill_n(dx[i].data, a.cols * dx[i].width, T(0));
      bodies.group_panels.multiply_t(a, static_cast<const T*>(p.values.data), dy.read(i), dx[i]);
      samples.unpack(dx.read(i), samples_from(p.out.as<T>(), dx.sample(i)), 0, a.cols);
    });
  });
}

template <class T>
void sample(const Bodies<T>& bodies, const Plan& plan, const Product& p, const Executor& executor) {
  const Groups& a = plan.groups();
  sample_product<T>(bodies.samples, plan, p, executor, kSampleStrip, kSampleStrip, a.bands,
                    [&](const SampleRows<T>* dy, const PanelSet<T>& x, bool accumulate,
                        int64_t begin, int64_t end) {
                      bodies.group_panels.sample(a, *dy, x.read(0), accumulate,
                                                 static_cast<T*>(p.values.data), begin, end);
                    });
}

struct GroupPanels {
  template <class T>
  static bool exists(const Bodies<T>& bodies) {
    return bodies.group_panels.multiply != nullptr;
  }
  template <class T>
  static void run(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                  const Executor& executor) {
    if (p.op == Op::spmm) return multiply(bodies, plan, p, executor);
    if (p.op == Op::spmm_t) return multiply_t(bodies, plan, p, executor);
    sample(bodies, plan, p, executor);
  }
  static Terms terms(const CostModel& model, const Summary& s, const Work& work) {
    return panel_terms(model, s, work,
                       static_cast<double>(s.vectors) * divide_up(work.batch, kLanes));
  }
};

}  // namespace

const Variant kGroupPanels = VariantOf<GroupPanels>::row(
    "panels", Layout::groups, {Op::spmm, Op::spmm_t, Op::sddmm}, false, INT64_MAX, false);

}  // namespace spfmt
