  using Scales = Mainloop::Sm1xxBlkScaledConfig;
  main.ptr_SFA = static_cast<decltype(main.ptr_SFA)>(args.a_scales);
  main.layout_SFA = Scales::tile_atom_to_shape_SFA(shape);
  main.ptr_SFB = static_cast<decltype(main.ptr_SFB)>(args.b_scales);
  main.layout_SFB = Scales::tile_atom_to_shape_SFB(shape);
