// What a thread sets up before it computes.

#ifndef FPC_THREADS_H
#define FPC_THREADS_H

// Subnormal numbers count while this lives, whatever the program has set for its own threads.
class KeepSubnormals {
   public:
#if defined(__x86_64__)
    KeepSubnormals() : saved_(__builtin_ia32_stmxcsr()) {
        __builtin_ia32_ldmxcsr(saved_ & ~0x8040u);
    }
    ~KeepSubnormals() { __builtin_ia32_ldmxcsr(saved_); }

   private:
    unsigned saved_;
#elif defined(__aarch64__)
    KeepSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(saved_ & ~(1ull << 24)));
    }
    ~KeepSubnormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

   private:
    unsigned long long saved_;
#endif
};

#endif
