from minidistill.bench.speed import main

main()
