// The four functions of libgomp that the kernels call, on pthreads: ThreadSanitizer sees who waits for whom.
//
// libgomp itself waits by futexes, which the sanitizer does not know, so that every barrier of it looks like a race.

#include <pthread.h>

#include <vector>

namespace {

struct Team {
  void (*work)(void*);
  void* data;
  unsigned threads;
  pthread_barrier_t barrier;
};

struct Member {
  Team* team;
  unsigned number;
};

thread_local Member current = {nullptr, 0};

void* run(void* argument) {
  current = *(Member*)argument;
  current.team->work(current.team->data);
  current = {nullptr, 0};
  return nullptr;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return current.number; }

int omp_get_num_threads() { return current.team ? current.team->threads : 1; }

void GOMP_barrier() {
  if (current.team) pthread_barrier_wait(&current.team->barrier);
}

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  Team team = {work, data, threads ? threads : 4, {}};
  pthread_barrier_init(&team.barrier, nullptr, team.threads);
  std::vector<Member> members;
  for (unsigned number = 0; number < team.threads; ++number) members.push_back({&team, number});
  std::vector<pthread_t> started(team.threads);
  for (unsigned number = 1; number < team.threads; ++number)
    pthread_create(&started[number], nullptr, run, &members[number]);
  run(&members[0]);
  for (unsigned number = 1; number < team.threads; ++number) pthread_join(started[number], nullptr);
  pthread_barrier_destroy(&team.barrier);
}
}
