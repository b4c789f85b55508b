#include "engine/session.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "dlpack.h"
#include "hooks.h"
#include "module.h"
#include "state.h"

namespace armt::bindings {
namespace {

LogitsWanted logits_from(const std::string& name) {
  if (name == "none") return LogitsWanted::none;
  if (name == "last") return LogitsWanted::last;
  if (name == "all") return LogitsWanted::all;
  throw InvalidArgument("logits: found '" + name + "', expected none, last or all");
}

using LogitsArrays = std::vector<std::optional<py::array_t<float>>>;

// The arrays that a call reads from and writes to while the GIL is released.
struct Prepared {
  std::vector<TokenIds> ids;
  std::vector<Call> calls;
  LogitsArrays logits;  // of each row, where asked for

  void add(Session& session, const py::array& tokens, LogitsWanted wanted) {
    ids.emplace_back(tokens);
    Call call;
    call.session = &session;
    call.tokens = ids.back().span();
    call.logits = wanted;
    const py::ssize_t vocab = session.engine()->config().decoder.vocab_size;
    if (wanted == LogitsWanted::none) {
      logits.emplace_back();
    } else {
      const auto count = static_cast<py::ssize_t>(call.tokens.size());
      py::array_t<float> out = wanted == LogitsWanted::last ? new_array({vocab}) : new_array({count, vocab});
      call.logits_out = out.mutable_data();
      logits.emplace_back(std::move(out));
    }
    calls.push_back(std::move(call));
  }
};

using SessionRows = std::vector<std::pair<std::shared_ptr<Session>, py::array>>;

void check_call(const Call& call, const Session& session) {
  const int64_t size = session.engine()->config().memory.segment_size;
  if (call.tokens.empty()) throw InvalidArgument("token ids: the input is empty, expected at least one token");
  if (call.one_segment && std::ssize(call.tokens) > size) {
    throw InvalidArgument("step: found " + std::to_string(call.tokens.size()) +
                          " tokens, expected at most segment_size = " + std::to_string(size) +
                          "; use feed() for longer input");
  }
}

Prepared prepared_calls(const SessionRows& rows, LogitsWanted wanted, bool one_segment, bool write, bool grow) {
  Prepared prepared;
  prepared.ids.reserve(rows.size());
  for (const auto& [session, tokens] : rows) {
    if (!session) throw InvalidArgument("sessions: found None, expected a Session");
    prepared.add(*session, tokens, wanted);
    Call& call = prepared.calls.back();
    call.one_segment = one_segment;
    call.write = write;
    call.grow = grow;
    check_call(call, *session);
  }
  return prepared;
}

LogitsArrays run_many(const SessionRows& rows, const std::string& logits, bool one_segment, bool write, bool grow,
                      const py::object& progress) {
  if (rows.empty()) return {};
  Prepared prepared = prepared_calls(rows, logits_from(logits), one_segment, write, grow);
  const RunHooks hooks = make_hooks(progress);
  {
    py::gil_scoped_release release;
    run_calls(*rows.front().first->engine(), prepared.calls, hooks);
  }
  return prepared.logits;
}

// The same with logits that stay on the device.
std::vector<DeviceArray> run_on_device(const SessionRows& rows, const std::string& logits, bool one_segment, bool write,
                                       const py::object& progress) {
  if (rows.empty()) return {};
  const LogitsWanted wanted = logits_from(logits);
  if (wanted == LogitsWanted::none) throw InvalidArgument("logits: found 'none', expected last or all");
  Prepared prepared = prepared_calls(rows, LogitsWanted::none, one_segment, write, false);
  std::vector<DeviceArray> arrays;
  arrays.reserve(rows.size());
  for (Call& call : prepared.calls) {
    const std::shared_ptr<Engine>& engine = call.session->engine();
    std::vector<int64_t> shape = {engine->config().decoder.vocab_size};
    if (wanted == LogitsWanted::all) shape.insert(shape.begin(), std::ssize(call.tokens));
    arrays.emplace_back(engine, std::move(shape));
    call.logits = wanted;
    call.logits_block = &arrays.back().block();
  }
  const RunHooks hooks = make_hooks(progress);
  {
    py::gil_scoped_release release;
    run_calls(*rows.front().first->engine(), prepared.calls, hooks);
  }
  return arrays;
}

// The stateless call of one row each: cuts and mask as given, an own session a row.
LogitsArrays forward(const std::vector<std::pair<std::shared_ptr<Session>, py::array>>& rows,
                     const std::vector<std::vector<int64_t>>& cuts, const std::vector<py::bytes>& attention,
                     const std::string& logits, bool close_last, bool windowed, const py::object& progress) {
  const LogitsWanted wanted = logits_from(logits);
  Prepared prepared;
  prepared.ids.reserve(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    prepared.add(*rows[i].first, rows[i].second, wanted);
    Call& call = prepared.calls.back();
    call.cuts = cuts.at(i);
    call.close_last = close_last;
    call.windowed = windowed;
    if (!attention.empty()) {
      const std::string_view mask(attention.at(i));
      call.attention.assign(mask.begin(), mask.end());
    }
  }
  const RunHooks hooks = make_hooks(progress);
  {
    py::gil_scoped_release release;
    run_calls(*rows.front().first->engine(), prepared.calls, hooks);
  }
  return prepared.logits;
}

std::vector<std::pair<int32_t, double>> choose(const std::vector<std::shared_ptr<Session>>& sessions,
                                               const std::vector<SamplingParams>& params) {
  if (params.size() != sessions.size()) {
    throw InvalidArgument("params: found " + std::to_string(params.size()) + " entries for " +
                          std::to_string(sessions.size()) + " sessions");
  }
  if (sessions.empty()) return {};
  std::vector<Session*> pointers;
  for (const auto& session : sessions) pointers.push_back(session.get());
  std::vector<std::pair<int32_t, double>> result;
  py::gil_scoped_release release;
  for (const Choice& choice : choose_tokens(pointers, params)) result.emplace_back(choice.token, choice.logprob);
  return result;
}

py::array_t<float> last_logits(const std::shared_ptr<Session>& session) {
  const py::ssize_t vocab = session->engine()->config().decoder.vocab_size;
  py::array_t<float> out = new_array({vocab});
  const Session* const pointer = session.get();
  float* const data = out.mutable_data();
  py::gil_scoped_release release;
  pointer->last_logits(data);
  return out;
}

py::array_t<double> score(Session& session, const py::array& tokens, bool write, const py::object& progress) {
  const TokenIds ids(tokens);
  std::vector<double> result(ids.span().size());
  const RunHooks hooks = make_hooks(progress);
  {
    py::gil_scoped_release release;
    session.score(ids.span(), write, result.data(), hooks);
  }
  const auto count = static_cast<py::ssize_t>(result.size());
  return to_array(std::move(result), {count});
}

std::shared_ptr<Session> new_session(const std::shared_ptr<Engine>& engine) {
  return std::make_shared<Session>(engine);
}

std::shared_ptr<Session> continued_session(const std::shared_ptr<Engine>& engine, const PyState& state) {
  return std::make_shared<Session>(engine, state.stream(*engine));
}

void bind_sampling(py::module_& m) {
  py::class_<SamplingParams>(m, "SamplingParams")
      .def(py::init([](double temperature, int64_t top_k, double top_p, double min_p, double repetition_penalty) {
             SamplingParams params{temperature, top_k, top_p, min_p, repetition_penalty};
             params.validate();
             return params;
           }),
           py::kw_only(), py::arg("temperature") = 0.0, py::arg("top_k") = 0, py::arg("top_p") = 1.0,
           py::arg("min_p") = 0.0, py::arg("repetition_penalty") = 1.0);
  m.def("uniform", &uniform, py::arg("seed"), py::arg("index"),
        "Number `index` of the counter-based sequence `seed`, in [0, 1).");
}

}  // namespace

void bind_session(py::module_& m) {
  bind_sampling(m);
  py::class_<Session, std::shared_ptr<Session>>(m, "Session", "One stream over a shared engine.")
      .def(py::init(&new_session), py::arg("engine"))
      .def(py::init(&continued_session), py::arg("engine"), py::arg("state"))
      .def(
          "close_segment",
          [](Session& session, const py::object& progress) {
            const RunHooks hooks = make_hooks(progress);
            py::gil_scoped_release release;
            session.close_segment(hooks);
          },
          py::arg("progress") = py::none())
      .def("reset", &Session::reset)
      .def("close", &Session::close, py::arg("wipe") = false)
      .def("fork", [](const Session& session) { return std::shared_ptr<Session>(session.fork()); })
      .def("set_seed", &Session::set_seed, py::arg("seed"))
      .def("snapshot", [](const Session& session) { return PyState(session.snapshot()); })
      .def(
          "rollback", [](Session& session, const PyState& state) { session.rollback(state.snapshot()); },
          py::arg("state"))
      .def("last_logits", &last_logits)
      .def("score", &score, py::arg("tokens"), py::arg("write"), py::arg("progress") = py::none())
      .def_property_readonly("closed", &Session::closed)
      .def_property_readonly("tokens", [](const Session& s) { return s.progress().tokens; })
      .def_property_readonly("segments", [](const Session& s) { return s.progress().closed_segments; })
      .def_property_readonly("open_tokens", [](const Session& s) { return s.progress().open_tokens; })
      .def_property_readonly("version", [](const Session& s) { return s.progress().version; });
  m.def("run_many", &run_many, py::arg("rows"), py::arg("logits"), py::arg("one_segment"), py::arg("write"),
        py::arg("grow"), py::arg("progress"));
  m.def("run_on_device", &run_on_device, py::arg("rows"), py::arg("logits"), py::arg("one_segment"), py::arg("write"),
        py::arg("progress"));
  m.def("forward", &forward, py::arg("rows"), py::arg("cuts"), py::arg("attention"), py::arg("logits"),
        py::arg("close_last"), py::arg("windowed"), py::arg("progress"));
  m.def("choose", &choose, py::arg("sessions"), py::arg("params"));
}

}  // namespace armt::bindings
